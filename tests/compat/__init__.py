"""The optional distributions in compat/."""
