"""What each driver can do at most: a bare loop over it, in its fastest known way.

A module for each kind of store has `bare_read(store, collection)` and `bare_write(store, collection, pages)`;
both return how many records they moved. `PUBLISHES = True` says that its `bare_write` leaves a
collection that is ready to be read, as a file that is written whole is.
"""
