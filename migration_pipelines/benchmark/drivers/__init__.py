"""What each driver can do at most: a bare loop over it, in its fastest known way."""
