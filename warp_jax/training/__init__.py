"""Training policies: sampling, scoring, policy gradient, supervised fine-tuning."""
