"""The log played into local memory: an index of names, mapped bytes, and who changes them."""
