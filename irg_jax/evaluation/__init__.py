"""What a run produced: read it, count it, draw it. Nothing here needs an accelerator."""
