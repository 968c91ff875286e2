import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # runs are compared to the last bit: no GPU keeps that
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import pytest
import torch

torch.set_num_threads(1)  # for models so small, a second thread costs more than it gives


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def files_in_repository() -> set[Path]:
    hidden = {".git", ".pytest_cache", "__pycache__"}
    found = set()
    for directory, names, files in os.walk(ROOT):
        names[:] = [name for name in names if name not in hidden]
        found |= {Path(directory) / file for file in files}
    return found


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_behind():
    """Tests write into tmp_path, never beside the code."""
    before = files_in_repository()
    yield
    left = sorted(str(path) for path in files_in_repository() - before)
    assert not left, f"the tests of this file left {left}"
