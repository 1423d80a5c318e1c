"""What those who watch a job are told while it waits and runs, on whichever replica each of them is."""
