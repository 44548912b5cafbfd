"""Training policies: scoring, policy gradient, supervised fine-tuning."""
