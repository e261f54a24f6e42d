"""The paper's five benchmarks: their prompts, layouts, judges and formulas."""
