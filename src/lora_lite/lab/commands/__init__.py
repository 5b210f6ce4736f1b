"""The commands of the lab and their flags."""
