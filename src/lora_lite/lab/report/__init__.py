"""Findings for people: tables, and a page with pictures."""
