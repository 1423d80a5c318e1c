"""Calls to the URLs that users gave with their jobs, made when those have ended."""
