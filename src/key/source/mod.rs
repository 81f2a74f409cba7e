//! Keys as people write them down: in lines, JSON, TOML or an environment variable.

mod entry;
mod fields;
mod json;
mod lines;
#[cfg(feature = "toml")]
mod toml;

use std::{fs::File, io::Read, path::Path, sync::Arc};

use self::entry::Entries;
pub(crate) use self::{entry::Unnamed, lines::variable};
use super::{
    rejected::{ParsedKey, Place, Reason, Rejected},
    spec::KeySpec,
};

/// The largest text that is parsed: room for some 300,000 keys.
const MOST_BYTES: usize = 32 << 20;

impl KeySpec {
    /// Parses the keys of a file, given its name and its text, for example to insert them with
    /// [`KeyPool::insert_all`](crate::KeyPool::insert_all).
    ///
    /// Each key, or the reason why it is none, comes with its line, or its position among the entries of a JSON text,
    /// from 1.
    ///
    /// [`KeyPoolBuilder::keys_from_file`](crate::KeyPoolBuilder::keys_from_file) describes the formats. The name decides
    /// the format as it does there, and stands in each [`Rejected`]. Unlike the builder, this function requires an id
    /// of each key.
    ///
    /// ```
    /// use tower_key_rotation::KeySpec;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let keys = KeySpec::parse_all("keys.txt", "# ours\nalpha|sk-1\nsk-2\n")?;
    /// let [(2, Ok(alpha)), (3, Err(rejected))] = &keys[..] else { panic!("{keys:?}") };
    /// assert_eq!(alpha.id.as_str(), "alpha");
    /// assert_eq!(rejected.to_string(), "keys.txt, line 3: the key has no id");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// The whole text can't be read: it is not valid JSON or TOML, or it is larger than 32 MiB or has more than
    /// 1,000,000 keys.
    // A name for the tuple would hide what is in it.
    #[allow(clippy::type_complexity)]
    pub fn parse_all(
        name: impl AsRef<str>,
        text: impl AsRef<[u8]>,
    ) -> Result<Vec<(usize, Result<Self, Rejected>)>, Rejected> {
        let keys = parse(name.as_ref(), text.as_ref(), Unnamed::Rejected)?;
        Ok(keys.into_iter().map(|parsed| (parsed.place.number(), parsed.key)).collect())
    }

    /// Parses one key, a JSON object with the fields of a [key file](crate::KeyPoolBuilder::keys_from_file).
    ///
    /// ```
    /// use tower_key_rotation::KeySpec;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let spec = KeySpec::from_json(r#"{"id": "alpha", "secret": "sk-1", "tier": 1}"#)?;
    /// assert_eq!(spec.tier, Some(1));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// The text is not a JSON object, or a field is missing, unknown or of the wrong type.
    pub fn from_json(text: impl AsRef<[u8]>) -> Result<Self, Rejected> {
        let name: Arc<str> = "JSON".into();
        let fields = json::one(&name, text.as_ref())?;
        Entries::new(Unnamed::Rejected).parsed(Place::Whole(name), fields).key
    }
}

/// Reads the keys of a file.
///
/// The outer error says that the file could not be read, the inner one that its text could not be parsed.
pub(crate) fn file(path: &Path, unnamed: Unnamed) -> std::io::Result<Result<Vec<ParsedKey>, Rejected>> {
    let mut text = Vec::new();
    File::open(path)?.take(MOST_BYTES as u64 + 1).read_to_end(&mut text)?;
    Ok(parse(&path.display().to_string(), &text, unnamed))
}

pub(crate) fn parse(name: &str, text: &[u8], unnamed: Unnamed) -> Result<Vec<ParsedKey>, Rejected> {
    let (file, name): (_, Arc<str>) = (Path::new(name), name.into());
    if text.len() > MOST_BYTES {
        return Err(Rejected::new(Place::Whole(name), None, Reason::TooLarge(MOST_BYTES >> 20)));
    }
    let text = text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(text);
    let mut entries = Entries::new(unnamed);
    if is_toml(file, text) {
        toml_keys(&name, text, &mut entries)?;
    } else if is_json(file, text) {
        json::read(&name, text, &mut entries)?;
    } else {
        lines::read(&name, text, &mut entries);
    }
    entries.all(name)
}

#[cfg(feature = "toml")]
fn toml_keys(name: &Arc<str>, text: &[u8], entries: &mut Entries) -> Result<(), Rejected> {
    toml::read(name, text, entries)
}

#[cfg(not(feature = "toml"))]
fn toml_keys(name: &Arc<str>, _: &[u8], _: &mut Entries) -> Result<(), Rejected> {
    Err(Rejected::new(Place::Whole(name.clone()), None, Reason::NoToml))
}

fn has_extension(file: &Path, extension: &str) -> bool {
    file.extension().is_some_and(|own| own.eq_ignore_ascii_case(extension))
}

/// A file of TOML under another name would otherwise be read as lines, each of them a secret.
fn is_toml(file: &Path, text: &[u8]) -> bool {
    let is_header = |line: &[u8]| line.trim_ascii() == b"[[key]]";
    has_extension(file, "toml")
        || !has_extension(file, "json") && text.split(|byte| *byte == b'\n').any(is_header)
}

fn is_json(file: &Path, text: &[u8]) -> bool {
    has_extension(file, "json") || matches!(text.trim_ascii_start().first(), Some(b'[' | b'{'))
}
