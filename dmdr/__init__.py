"""DMDR: few-step distillation and reinforcement learning of diffusion models, in one run."""
