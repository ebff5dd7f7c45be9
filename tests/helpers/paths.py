"""Where the repository lies, and the real data that may lie beside it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHARTQA = ROOT.parent / "shared/data/chartqa"
REAL_PROCESSOR = ROOT.parent / "shared/data/qwen2_5_vl_7b_processor"
GOLDEN = ROOT / "tests/golden"

needs_real_processor = pytest.mark.skipif(
    not REAL_PROCESSOR.is_dir(), reason=f"the real Qwen2.5-VL processor files are not at {REAL_PROCESSOR}"
)
