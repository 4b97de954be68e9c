"""Every byte that is not local: object stores, reads that are hedged, the cache of media."""
