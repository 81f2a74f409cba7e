//! The tests of this package show what the compiler says of likely mistakes.
