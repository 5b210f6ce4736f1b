"""Language models for the lab, their devices and their chat templates."""
