"""Short programs to read: iRPE in a model that was built without it."""
