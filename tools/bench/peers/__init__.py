"""The same work in other libraries, each a script that needs nothing of ours."""
