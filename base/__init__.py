"""The ground floor: errors, words, typed values, files and command lines. Standard library only."""
