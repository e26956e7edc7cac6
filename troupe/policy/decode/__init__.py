"""The decoding engine: requests in, completions out."""
