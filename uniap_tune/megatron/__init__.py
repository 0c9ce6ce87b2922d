"""Megatron-LM's arguments: what a configuration says, what each version knows, what Megatron refuses."""
