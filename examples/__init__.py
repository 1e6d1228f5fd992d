"""The notebooks, what they run with, and how their pages are made."""
