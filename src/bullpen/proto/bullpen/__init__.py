"""The root of the folders that the messages' packages ask for."""
