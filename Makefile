# Two commands do everything on a fresh machine: `make demo` and `make test`.
