"""One file per store; the file's name is the store's kind, its class is bound to `STORE`."""
