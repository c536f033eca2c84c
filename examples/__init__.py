"""Short programs that use irpe_core as a library."""
