"""Data: files of rows to tasks, and a cursor over them that can be resumed."""
