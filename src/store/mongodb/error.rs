//! What went wrong, without what must not be said.

use std::time::Duration;

use ::mongodb::error::{Error, ErrorKind, WriteFailure};

use crate::store::StoreError;

/// Why an operation failed. It holds texts of this crate and the driver's own, never the server's: a server's
/// error may quote the command that it refused, keys included.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Failure {
    #[error("{0}")]
    Driver(String),
    #[error("MongoDB refused it with code {code}{}", named(.name))]
    Server { code: i32, name: String },
    #[error("MongoDB took longer than {0:?}; it is not known whether it was done")]
    TookTooLong(Duration),
    #[error("the same operation, begun more than {0:?} ago, is still under way")]
    StillUnderWay(Duration),
    #[cfg(feature = "encryption")]
    #[error("a secret could not be encrypted")]
    NotEncrypted,
    #[cfg(feature = "encryption")]
    #[error("there are no data keys: give them to `MongoStoreBuilder::encrypt_with`")]
    NoDataKeys,
    #[error("the operation panicked, or its runtime has shut down")]
    BrokenOff,
}

fn named(name: &str) -> String {
    if name.is_empty() { String::new() } else { format!(" ({name})") }
}

/// On one line, and no longer than one: a server may call its errors anything.
fn printable(text: &str) -> String {
    const LONGEST: usize = 400;
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(LONGEST).collect()
}

impl Failure {
    pub(super) fn server(code: i32, name: &str) -> Self {
        Self::Server { code, name: printable(name) }
    }

    pub(super) fn is_duplicate(&self) -> bool {
        matches!(self, Self::Server { code: 11_000, .. })
    }

    /// What is refused for what a document is will be refused again.
    pub(super) fn is_about_the_document(&self) -> bool {
        const BAD_VALUE: i32 = 2;
        const TYPE_MISMATCH: i32 = 14;
        const IMMUTABLE_FIELD: i32 = 66;
        const VALIDATION: i32 = 121;
        const TOO_LARGE: i32 = 10_334;
        const TOO_LARGE_AFTER_UPDATE: i32 = 17_419;
        match self {
            Self::Server { code, .. } => {
                matches!(
                    *code,
                    BAD_VALUE
                        | TYPE_MISMATCH
                        | IMMUTABLE_FIELD
                        | VALIDATION
                        | TOO_LARGE
                        | TOO_LARGE_AFTER_UPDATE
                ) || self.is_duplicate()
            }
            _ => false,
        }
    }

    pub(super) fn is_from_server(&self) -> bool {
        matches!(self, Self::Server { .. })
    }
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        Self::new(failure)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let server = Self::server;
        match &*error.kind {
            ErrorKind::Command(error) => server(error.code, &error.code_name),
            ErrorKind::Write(WriteFailure::WriteError(error)) => {
                server(error.code, error.code_name.as_deref().unwrap_or_default())
            }
            ErrorKind::Write(WriteFailure::WriteConcernError(error)) => server(error.code, &error.code_name),
            ErrorKind::Authentication { .. }
            | ErrorKind::ConnectionPoolCleared { .. }
            | ErrorKind::DnsResolve { .. }
            | ErrorKind::IncompatibleServer { .. }
            | ErrorKind::InvalidTlsConfig { .. }
            | ErrorKind::Io(_)
            | ErrorKind::ServerSelection { .. }
            | ErrorKind::Shutdown => Self::Driver(printable(&without_answers(&error.kind.to_string()))),
            ErrorKind::InvalidArgument { .. } => {
                Self::Driver("the driver was given an invalid argument".into())
            }
            ErrorKind::InvalidResponse { .. } => Self::Driver("the server's answer made no sense".into()),
            _ => Self::Driver("the driver failed".into()),
        }
    }
}

/// The driver's description of the servers that it knows is of use, but may quote what one of them answered.
fn without_answers(text: &str) -> String {
    let quotes = ["Command failed", "server response: Some"].iter().any(|quote| text.contains(quote));
    match text.split_once("Topology:") {
        Some((what, _)) if quotes => format!("{what}A server answers with an error."),
        _ if quotes => "a server answers with an error".to_owned(),
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use ::mongodb::{
        bson::{deserialize_from_document, doc},
        options::ClientOptions,
    };

    use super::*;

    #[test]
    fn of_what_the_server_says_only_the_code_and_its_name_are_passed_on() {
        let answer =
            doc! { "code": 11_600, "codeName": "InterruptedAtShutdown", "errmsg": "update with sk-1" };
        let command = ErrorKind::Command(deserialize_from_document(answer.clone()).unwrap());
        let concern = WriteFailure::WriteConcernError(deserialize_from_document(answer).unwrap());
        for kind in [command, ErrorKind::Write(concern)] {
            let failure = Failure::from(Error::from(kind));
            assert!(failure.is_from_server() && !failure.is_about_the_document());
            let said = "MongoDB refused it with code 11600 (InterruptedAtShutdown)";
            assert_eq!(failure.to_string(), said);
        }
        assert!(!Failure::BrokenOff.is_from_server());
    }

    #[tokio::test]
    async fn of_an_argument_that_the_driver_refuses_nothing_is_quoted() {
        let error = ClientOptions::parse("mongodb://user:pass word@/").await.unwrap_err();
        assert!(matches!(&*error.kind, ErrorKind::InvalidArgument { .. }), "{error:?}");
        assert_eq!(Failure::from(error).to_string(), "the driver was given an invalid argument");
    }

    #[test]
    fn what_the_driver_says_of_a_server_is_cut_where_it_quotes_an_answer() {
        let said = |state: &str| format!("No available servers. Topology: {{ Address: a:27017, {state} }}");
        let quoting = said("Error: Command failed: sk-1");
        assert_eq!(without_answers(&quoting), "No available servers. A server answers with an error.");
        assert_eq!(without_answers("Command failed: sk-1"), "a server answers with an error");
        let plain = said("Error: Connection refused");
        assert_eq!(without_answers(&plain), plain);
    }
}
