"""Records of the six learning modes, made from prompts by a base model, a painter and a critic."""
