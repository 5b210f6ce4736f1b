"""`check`: does every adapter have an effect, and does it get a true gradient?"""
