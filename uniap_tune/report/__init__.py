"""Everything people read on stdout, one module a command, and the pictures. The only package that imports rich."""
