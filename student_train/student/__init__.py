"""The student: built, checked against its cache, adapted, saved, loaded again."""
