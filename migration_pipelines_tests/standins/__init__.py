"""Servers that speak a store's own protocol, for vendors' clients to talk to where no server can be had."""
