"""The server without its model: the same trees and books, driven by a trace."""
