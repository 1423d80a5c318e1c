"""Kills everything at random while users submit jobs, then proves from what is left that no job was lost or doubled."""
