"""Adapters in Hugging Face's layout."""
