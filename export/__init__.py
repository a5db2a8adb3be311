"""The backends that a step graph is handed to, one a file: import them as ``tokencache_compile.export``."""

if __name__ != "tokencache_compile.export":
    raise ImportError(
        f"This folder is the package tokencache_compile.export and was imported as {__name__!r}, which would load every "
        "module in it a second time. Write `from tokencache_compile.export import ...`."
    )
