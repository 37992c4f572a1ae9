"""One module or package per store; its name is the store's kind, its class is bound to `STORE`."""
