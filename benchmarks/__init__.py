"""What `make bench` measures: sizes, reading and listing. README.md beside this file says how to read the tables."""
