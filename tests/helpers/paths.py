"""Where the repository lies, and the real data that may lie beside it."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CHARTQA = ROOT.parent / "shared/data/chartqa"
REAL_PROCESSOR = ROOT.parent / "shared/data/qwen2_5_vl_7b_processor"
GOLDEN = ROOT / "tests/golden"
