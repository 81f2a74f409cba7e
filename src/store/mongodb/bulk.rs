//! Many updates in one command.

use ::mongodb::bson::{Bson, Document, doc};

use super::{
    error::Failure,
    inner::{Documents, Inner, primary},
};

/// The most updates of one command.
pub(super) const AT_ONCE: usize = 500;

/// The outcome of several updates.
#[derive(Default)]
pub(super) struct Updated {
    #[cfg_attr(
        not(feature = "encryption"),
        expect(dead_code, reason = "only the encryption of documents counts")
    )]
    pub(super) modified: u64,
    pub(super) refused: Vec<Refused>,
}

/// An update that the server did not make.
pub(super) struct Refused {
    pub(super) index: usize,
    pub(super) code: i32,
}

impl Inner {
    /// By a command of our own: the driver has no bulk write for servers older than 8.0. The driver does not try it
    /// again.
    pub(super) async fn update_each(
        &self,
        collection: &Documents,
        statements: Vec<Document>,
    ) -> Result<Updated, Failure> {
        if statements.is_empty() {
            return Ok(Updated::default());
        }
        let command = doc! {
            "update": collection.name(),
            "updates": statements,
            "ordered": false,
            "writeConcern": { "w": "majority", "wtimeout": self.limits.operation.as_millis() as i64 },
        };
        let answer = self.database.run_command(command).selection_criteria(primary()).await?;
        let errors = answer.get_array("writeErrors").into_iter().flatten();
        let refused = errors.filter_map(Bson::as_document).map(Refused::read).collect::<Result<_, _>>()?;
        if let Ok(error) = answer.get_document("writeConcernError") {
            let code = error.get_i32("code").unwrap_or_default();
            return Err(Failure::server(code, error.get_str("codeName").unwrap_or_default()));
        }
        let modified = answer.get_i32("nModified").unwrap_or_default().max(0).unsigned_abs().into();
        Ok(Updated { modified, refused })
    }
}

impl Updated {
    /// An error if an update was refused for another reason than its document.
    pub(super) fn if_only_documents_refuse(self) -> Result<Self, Failure> {
        match self.refused.iter().find(|refused| !refused.is_about_the_document()) {
            Some(refused) => Err(refused.failure()),
            None => Ok(self),
        }
    }
}

impl Refused {
    fn read(error: &Document) -> Result<Self, Failure> {
        let code = error.get_i32("code").unwrap_or_default();
        match error.get_i32("index").map(usize::try_from) {
            Ok(Ok(index)) => Ok(Self { index, code }),
            _ => Err(Failure::server(code, "")),
        }
    }

    pub(super) fn failure(&self) -> Failure {
        Failure::server(self.code, "")
    }

    pub(super) fn is_about_the_document(&self) -> bool {
        self.failure().is_about_the_document()
    }
}
