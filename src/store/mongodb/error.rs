//! Why an operation failed, without secrets.

use std::time::Duration;

use ::mongodb::error::{Error, ErrorKind, WriteFailure};

use crate::store::{StoreError, encryption::NotEncrypted};

/// Why an operation failed. It holds texts of this crate and the driver's own, never the server's: a server's
/// error may quote the command that it refused, keys included.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Failure {
    #[error("{0}")]
    Driver(String),
    #[error("{0}")]
    NoServer(String),
    #[error("MongoDB refused it with code {code}{}", named(.name))]
    Server { code: i32, name: String },
    #[error("MongoDB took longer than {0:?}; it is not known whether it was done")]
    TookTooLong(Duration),
    #[error("the same operation, begun more than {0:?} ago, is still under way")]
    StillUnderWay(Duration),
    #[error(transparent)]
    NotEncrypted(#[from] NotEncrypted),
    #[cfg(feature = "encryption")]
    #[error("there are no data keys: give them to `MongoStoreBuilder::encrypt_with`")]
    NoDataKeys,
    #[error("the operation panicked, or its runtime has shut down")]
    BrokenOff,
    #[error("{0} documents change faster than they can be read")]
    Unsettled(usize),
}

const DUPLICATE_KEY: i32 = 11_000;

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
        self.has_one_of(&[DUPLICATE_KEY])
    }

    /// Whether the server cannot have begun to do it.
    pub(super) fn happened_before_sending(&self) -> bool {
        matches!(self, Self::NoServer(_) | Self::StillUnderWay(_))
            || self.has_one_of(&[
                13,     // Unauthorized
                18,     // AuthenticationFailed
                10_107, // NotWritablePrimary
                13_435, // NotPrimaryNoSecondaryOk
            ])
    }

    /// Document validation errors are permanent: do not retry.
    pub(super) fn is_about_the_document(&self) -> bool {
        self.has_one_of(&[
            2,      // BadValue
            14,     // TypeMismatch
            66,     // ImmutableField
            121,    // DocumentValidationFailure
            10_334, // BSONObjectTooLarge
            17_419, // the same, after an update
            DUPLICATE_KEY,
        ])
    }

    fn has_one_of(&self, codes: &[i32]) -> bool {
        matches!(self, Self::Server { code, .. } if codes.contains(code))
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
        let said = || printable(&without_answers(&error.kind.to_string()));
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
            | ErrorKind::Shutdown => Self::Driver(said()),
            ErrorKind::ServerSelection { .. } => Self::NoServer(said()),
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
    fn server_errors_show_only_code_and_code_name() {
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
    async fn a_rejected_driver_argument_is_not_quoted() {
        let error = ClientOptions::parse("mongodb://user:pass word@/").await.unwrap_err();
        assert!(matches!(&*error.kind, ErrorKind::InvalidArgument { .. }), "{error:?}");
        assert_eq!(Failure::from(error).to_string(), "the driver was given an invalid argument");
    }

    #[test]
    fn server_answers_are_cut_from_driver_messages() {
        let said = |state: &str| format!("No available servers. Topology: {{ Address: a:27017, {state} }}");
        let quoting = said("Error: Command failed: sk-1");
        assert_eq!(without_answers(&quoting), "No available servers. A server answers with an error.");
        assert_eq!(without_answers("Command failed: sk-1"), "a server answers with an error");
        let plain = said("Error: Connection refused");
        assert_eq!(without_answers(&plain), plain);
    }
}
