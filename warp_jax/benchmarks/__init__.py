"""Compare trained policies: sampled answers, side-by-side judging, lm-evaluation-harness."""
