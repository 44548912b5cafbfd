"""Diagnosis of training steps that went wrong."""
