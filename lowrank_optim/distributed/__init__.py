"""The only folder that knows how a matrix is laid out over processes and which collectives that needs."""
