"""The compiler passes, one a file: import them as ``tokencache_compile.passes``."""

if __name__ != "tokencache_compile.passes":
    raise ImportError(
        f"This folder is the package tokencache_compile.passes and was imported as {__name__!r}, which would load every "
        "module in it a second time. Write `from tokencache_compile.passes import ...`."
    )
