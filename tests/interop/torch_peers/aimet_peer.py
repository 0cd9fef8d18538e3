"""AIMET, imported beside any build of torch.

It names torchvision's layers and data sets in its tables, and uses none here. It imports `peft`
too, which has to see what is there, and so comes first.
"""

import importlib
import sys
import warnings
from unittest import mock

import peft  # noqa: F401
import pytest

with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    patch.setitem(sys.modules, "torchvision", mock.MagicMock())
    affine = importlib.import_module("aimet_torch.quantization.affine")
    analyzers = importlib.import_module("aimet_torch.quantization.encoding_analyzer")
    defs = importlib.import_module("aimet_torch.common.defs")
    lora = importlib.import_module("aimet_torch.peft")
    quantsim = importlib.import_module("aimet_torch.quantsim")
