//! What the programs of this package share: where the service is.
//!
//! Each program in `src/bin` is complete: a pool, a client with keys from it, and a request. All take the address of
//! the service as their first argument, and the keys from the variable `KEYS`, such as `alpha=sk-1,beta=sk-2`.

/// The first argument: `http://127.0.0.1:8080`, without a path.
pub fn service() -> String {
    std::env::args().nth(1).expect("the address of the service is the first argument")
}
