"""Code that at least two services share. It knows no word of their domains."""
