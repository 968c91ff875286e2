import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import pytest
import torch

torch.set_num_threads(1)  # the models are so small that a second thread costs more than it gives


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
