//! From names, URIs and clients to a store; and that nothing it says holds a secret.

mod support;

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use mongodb::{
    Client,
    bson::{DateTime, Document, doc},
    event::{EventHandler, command::CommandEvent},
    options::ClientOptions,
};
use support::{mongo::*, *};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tower_key_rotation::{
    KeyId, KeyPool, OperateError, RecoveryHandle, Status,
    store::{
        KeyStore, Usage,
        mongodb::{ConnectError, Fields, MongoStore},
    },
};

const STANDBY: &str = "standby_keys";

/// Where a mongod of these tests listens.
fn address(mongo: &Mongo) -> String {
    mongo.uri.trim_start_matches("mongodb://").split('/').next().unwrap().to_owned()
}

fn error(connected: Result<MongoStore, ConnectError>) -> ConnectError {
    match connected {
        Ok(store) => panic!("there is a store: {store:?}"),
        Err(error) => error,
    }
}

#[tokio::test]
async fn names_that_are_configured_are_used_for_everything() {
    let mongo = Mongo::replica_set().await;
    let keys = mongo.database.collection::<Document>("provider_keys");
    let standby = mongo.database.collection::<Document>("spare_keys");
    let key = |id: &str| {
        doc! {
            "_id": id, "token": format!("sk-{id}"), "state": "healthy",
            "tokens": 7_i32, "calls": 2.0, "made": DateTime::from_millis(0),
        }
    };
    keys.insert_many([key("alpha"), key("beta")]).await.unwrap();
    let spare = doc! { "_id": "spare", "token": "sk-spare", "isUsed": false, "activated": false };
    standby.insert_one(spare).await.unwrap();
    let fields = Fields::default()
        .api_key("token")
        .status("state")
        .cooldown_until("restsUntil")
        .last_error("complaint")
        .tokens_used("tokens")
        .requests_count("calls")
        .created_at("made")
        .last_used_at("used")
        .updated_at("touched");
    let builder = mongo.builder().collection("provider_keys").standby_collection("spare_keys").fields(fields);
    let process = Process::over(builder.clone().connect(&mongo.uri).await.unwrap()).await;
    let other = Process::over(builder.clone().connect(&mongo.uri).await.unwrap()).await;
    let read = async |id: &str| keys.find_one(doc! { "_id": id }).await.unwrap().unwrap();

    process.sees("alpha", 429).await;
    process.pass().await;
    let alpha = read("alpha").await;
    assert_eq!(alpha.get_str("state").unwrap(), "rate_limited");
    assert_eq!(alpha.get_str("complaint").unwrap(), "rate limited (HTTP 429)");
    assert!(alpha.get_datetime("restsUntil").unwrap() > alpha.get_datetime("touched").unwrap());
    assert!(alpha.get_f64("calls").unwrap() >= 3.0, "{alpha}");
    assert!(alpha.get_datetime("used").is_ok());
    eventually("another process sees it", || other.status("alpha") == Some(Status::RateLimited)).await;

    let past = doc! { "$set": { "restsUntil": DateTime::from_millis(1_000) } };
    keys.update_one(doc! { "_id": "alpha" }, past).await.unwrap();
    process.pass().await;
    assert_eq!(read("alpha").await.get_str("state").unwrap(), "healthy");

    process.pool.record_usage(&KeyId::new("beta").unwrap(), 10);
    process.pool.reset("beta").await.unwrap();
    process.pool.disable("alpha").await.unwrap();
    process.pool.insert("gamma", "sk-gamma").await.unwrap();
    process.pass().await;
    let beta = read("beta").await;
    assert_eq!(beta.get_i64("tokens").unwrap(), 17);
    assert_eq!(beta.get_document("rest").unwrap().get_i64("g").unwrap(), 1);
    assert_eq!(read("alpha").await.get_str("state").unwrap(), "disabled");
    let gamma = read("gamma").await;
    assert_eq!(["token", "state"].map(|field| gamma.get_str(field).unwrap()), ["sk-gamma", "healthy"]);
    assert!(gamma.get_datetime("made").is_ok());

    process.sees("beta", 401).await;
    process.pass().await;
    let spare = read("spare").await;
    assert_eq!(["token", "replacedKey"].map(|field| spare.get_str(field).unwrap()), ["sk-spare", "beta"]);
    let used = standby.find_one(doc! { "_id": "spare" }).await.unwrap().unwrap();
    assert_eq!(used.get_str("usedFor").unwrap(), "beta");
    process.pool.remove("gamma").await.unwrap();
    process.recovery.shutdown().await.unwrap();

    for id in ["alpha", "beta", "spare"] {
        let document = read(id).await;
        assert!(FIELDS[..KNOWN_TO_OTHERS].iter().all(|field| !document.contains_key(*field)), "{document}");
    }
    let mut collections = mongo.database.list_collection_names().await.unwrap();
    collections.sort_unstable();
    assert_eq!(collections, ["provider_keys", "spare_keys"]);

    builder.connect(&mongo.uri).await.unwrap().ensure_indexes().await.unwrap();
    let of_sweeps = [doc! { "state": 1, "restsUntil": 1 }, doc! { "limits.u": 1 }];
    assert_eq!(index_keys(&keys).await[1..], of_sweeps);
}

#[tokio::test]
async fn keys_default_to_the_database_of_the_uri() {
    let mongo = Mongo::standalone().await;
    let uri = mongo.uri.replace("/?", "/gateway?");
    let store = MongoStore::connect(&uri).await.unwrap();
    assert!(format!("{store:?}").contains("gateway.keys"), "{store:?}");
    let client = Client::with_uri_str(&uri).await.unwrap();
    let store = MongoStore::builder().over(&client).unwrap();
    assert!(format!("{store:?}").contains("gateway.keys"), "{store:?}");
}

#[tokio::test]
async fn uris_without_a_database_are_refused_with_advice() {
    let refused = error(MongoStore::connect("mongodb://127.0.0.1:1").await);
    assert!(refused.to_string().contains("mongodb://host/gateway"), "{refused}");
}

#[tokio::test]
async fn invalid_mongodb_names_are_refused_and_quoted() {
    const NOWHERE: &str = "mongodb://127.0.0.1:1";
    let invalid = |name: &str| format!("{name:?} can't be the name of a MongoDB database or collection here");
    let invalid_field =
        |name: &str| format!("{name:?} can't be the name of a field, or another field has it");
    let at = async |builder: tower_key_rotation::store::mongodb::MongoStoreBuilder| {
        error(builder.connect_later(NOWHERE).await)
    };
    for name in ["", "a b", "a.b", "a$b", "a/b", "a\\b", "a\"b", "a\0b"] {
        let refused = at(MongoStore::builder().database(name)).await;
        assert_eq!(refused.to_string(), invalid(name));
    }
    for name in ["", "a$b", "a\0b"] {
        assert_eq!(at(MongoStore::builder().collection(name)).await.to_string(), invalid(name));
        assert_eq!(at(MongoStore::builder().standby_collection(name)).await.to_string(), invalid(name));
    }
    let same = MongoStore::builder().collection("keys").standby_collection("keys");
    assert_eq!(at(same).await.to_string(), invalid("keys"));
    let fields = |name: &str| Fields::default().cooldown_until(name);
    for name in ["", "$rests", "a.b", "a\0b", "_id", "status", "rest", "serverTime", "usageWriters"] {
        let refused = at(MongoStore::builder().fields(fields(name))).await;
        assert_eq!(refused.to_string(), invalid_field(name));
    }

    let client = Client::with_uri_str(NOWHERE).await.unwrap();
    assert_eq!(error(MongoStore::builder().database("a b").over(&client)).to_string(), invalid("a b"));
    let connected = MongoStore::builder().fields(fields("status")).connect(NOWHERE).await;
    assert_eq!(error(connected).to_string(), invalid_field("status"));
}

#[tokio::test]
async fn s01_uri_errors_and_logs_omit_the_password() {
    let passwords = [
        "hunter2",
        "hunter2@x",
        "hunter2/x",
        "hunter2:x",
        "hunter2%",
        "hunter2%zz",
        "hunter2?x=y",
        "hunter2#",
        "hunter2[",
        "hunter2]",
        "hunter2 x",
        "hunter2$x",
        "hunter2'\"",
        "hünter2hunter2",
        "@hunter2",
        "/hunter2",
        ":hunter2",
        "%hunter2",
        "?hunter2",
        "x@y@hunter2",
        "hunter2\n",
    ];
    let shapes: [fn(&str) -> String; 13] = [
        |password| format!("mongodb://user:{password}@127.0.0.1:1/gateway?connectTimeoutMS=50"),
        |password| format!("mongodb://user:{password}@127.0.0.1:none"),
        |password| format!("mongodb://user:{password}@127.0.0.1:99999"),
        |password| format!("mongodb://user:{password}@"),
        |password| format!("mongodb://user:{password}"),
        |password| format!("mongodb://user:{password}%40127.0.0.1"),
        |password| format!("mongodb://user:{password}@127.0.0.1/?tls=maybe"),
        |password| format!("mongodb://user:{password}@127.0.0.1/?w=-5&nosuchoption=1"),
        |password| format!("mongodb://user:{password}@127.0.0.1/a b?authMechanism=NONE"),
        |password| format!("mongodb://user:{password}@[::1/"),
        |password| format!("mongodb+srv://user:{password}@127.0.0.1:1/"),
        |password| format!("mongo://user:{password}@127.0.0.1"),
        |password| format!("user:{password}@127.0.0.1"),
    ];
    let (logs, _guard) = Logs::capture();
    let builder =
        MongoStore::builder().database("gateway").operation_limit(SECOND / 10).connect_limit(2 * SECOND);
    let mut leaks = Vec::new();
    for uri in shapes.iter().flat_map(|shape| passwords.map(shape)) {
        let Err(refused) = builder.clone().connect_later(&uri).await else { continue };
        assert!(refused.to_string().starts_with("the MongoDB URI can't be used"), "{uri:?}: {refused}");
        assert!(!refused.is_unreachable());
        if all_that_it_says(&refused).to_lowercase().contains("hunter2") {
            leaks.push((uri, refused.to_string()));
        }
    }
    assert!(leaks.is_empty(), "{leaks:#?}");
    let unreachable = error(builder.connect(shapes[0]("hunter2%40%2F")).await);
    assert!(unreachable.is_unreachable(), "{unreachable}");
    assert!(!all_that_it_says(&unreachable).contains("hunter2"), "{unreachable:?}");
    assert!(!logs.text().contains("hunter2"));
}

#[tokio::test]
async fn s01_uri_option_errors_omit_passwords() {
    let options = [
        "tlsCertificateKeyFilePassword=hunter2",
        "tls=true&tlsCertificateKeyFile=/nowhere&tlsCertificateKeyFilePassword=hunter2",
        "authMechanismProperties=AWS_SESSION_TOKEN:hunter2",
        "authMechanism=MONGODB-AWS&authMechanismProperties=hunter2",
        "password=hunter2",
        "proxyPassword=hunter2",
        "authMechanismProperties=hunter2",
        "tlsCertificateKeyFilePassword=a&hunter2",
    ];
    for option in options {
        let uri = format!("mongodb://127.0.0.1:1/?{option}");
        let Err(refused) = MongoStore::builder().connect_later(&uri).await else { continue };
        let said = all_that_it_says(&refused);
        assert!(!said.contains("hunter2"), "{said}");
    }
}

#[tokio::test]
async fn errors_of_uris_without_credentials_name_the_cause() {
    for (uri, cause) in [("localhost", "scheme"), ("mongodb://a:27017,b:0/gateway", "port")] {
        let refused = error(MongoStore::builder().connect_later(uri).await);
        assert!(refused.to_string().contains(cause), "{uri}: {refused}");
    }
}

#[tokio::test]
async fn f01_failed_authentication_names_its_cause_but_no_password() {
    let mongo = Mongo::standalone().await;
    let uri = format!("mongodb://nobody:hunter2@{}/?directConnection=true", address(&mongo));
    let refused = error(mongo.builder().connect(uri).await);
    let said = all_that_it_says(&refused);
    assert!(refused.is_unreachable(), "{said}");
    assert!(said.to_lowercase().contains("auth"), "{said}");
    assert!(!said.contains("hunter2"), "{said}");
}

#[tokio::test]
async fn limits_accept_duration_max() {
    let mongo = Mongo::standalone().await;
    let builder = mongo.builder().operation_limit(Duration::MAX).connect_limit(Duration::MAX);
    let store = builder.connect(&mongo.uri).await.unwrap();
    assert!(store.insert("alpha", "sk-1").await);
    store.add_usage(vec![Usage::new(KeyId::new("alpha").unwrap(), 2, 3)]).await.unwrap();
}

/// A server of nobody's make: it lets everybody in, and whatever it is asked then is an error that it calls so.
async fn refusing(code_name: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("mongodb://{}/gateway?directConnection=true", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            // It ends when the client goes.
            tokio::spawn(refuse(client, code_name));
        }
    });
    uri
}

async fn refuse(mut client: TcpStream, code_name: &str) -> io::Result<()> {
    const HEADER: usize = 16;
    const FLAGS_AND_KIND: usize = 5;
    loop {
        let length = client.read_i32_le().await? as usize;
        let mut asked = vec![0; length - 4];
        client.read_exact(&mut asked).await?;
        let request = i32::from_le_bytes(asked[..4].try_into().unwrap());
        let command = Document::from_reader(&asked[HEADER - 4 + FLAGS_AND_KIND..]).unwrap();
        let answer = match command.keys().next().unwrap().as_str() {
            "hello" | "isMaster" | "ismaster" => doc! {
                "ok": 1, "helloOk": true, "isWritablePrimary": true, "ismaster": true,
                "minWireVersion": 0, "maxWireVersion": 17, "maxBsonObjectSize": 16_777_216,
                "maxMessageSizeBytes": 48_000_000, "maxWriteBatchSize": 100_000,
            },
            _ => doc! { "ok": 0, "code": 13, "codeName": code_name, "errmsg": code_name },
        };
        let answer = answer.to_vec().unwrap();
        let length = HEADER + FLAGS_AND_KIND + answer.len();
        for number in [length as i32, 0, request, 2013, 0] {
            client.write_i32_le(number).await?;
        }
        client.write_u8(0).await?;
        client.write_all(&answer).await?;
    }
}

#[tokio::test]
async fn s04_server_error_names_print_as_one_bounded_line() {
    let (logs, _guard) = Logs::capture();
    let names =
        ["Up\n INFO tower_key_rotation: all is well\r\u{1b}[2J\u{9b}31m\0", "long ".repeat(20_000).leak()];
    for (number, name) in (1..).zip(names) {
        let uri = refusing(name).await;
        let mut said = all_that_it_says(&error(MongoStore::builder().connect(&uri).await));
        let store = MongoStore::builder().poll_interval(SECOND / 20).connect_later(&uri).await.unwrap();
        let pool = KeyPool::builder().key("alpha", "sk-alpha").open_when_ready(store).unwrap();
        let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
        said += &all_that_it_says(&pool.reload().await.unwrap_err());
        said += &all_that_it_says(&pool.reset("alpha").await.unwrap_err());
        said += &all_that_it_says(&recovery.sweep_now().await.outcome.unwrap_err());
        assert!(said.contains("code 13") && !said.contains("Up\n"), "{said}");
        for line in said.lines() {
            assert!(line.len() < 2_000 && !line.chars().any(char::is_control), "{line:?}");
        }
        eventually("it is logged", || logs.count("no change stream: the keys") == number).await;
    }
    for line in logs.ours() {
        assert!(line.len() < 1_000 && !line.chars().any(char::is_control), "{line:?}");
    }
    assert!(
        !logs
            .text()
            .lines()
            .any(|line| line.trim_start().starts_with("INFO tower_key_rotation: all is well"))
    );
}

/// A client as a user may have it, and the commands that it sends.
async fn own_client(uri: String) -> (Client, Arc<Mutex<Vec<Document>>>) {
    let commands: Arc<Mutex<Vec<Document>>> = Arc::default();
    let seen = commands.clone();
    let mut options = ClientOptions::parse(uri).await.unwrap();
    options.command_event_handler = Some(EventHandler::callback(move |event| {
        if let CommandEvent::Started(started) = event {
            seen.lock().unwrap().push(started.command);
        }
    }));
    (Client::with_options(options).unwrap(), commands)
}

/// Everything that a store can be asked for, over the user's own client.
async fn assert_acknowledged_and_from_the_primary(options: &str) {
    let mongo = Mongo::replica_set().await;
    mongo.insert_all(["alpha", "beta"]).await;
    mongo.standby().insert_one(standby("spare")).await.unwrap();
    let (client, commands) = own_client(format!("{}&{options}", mongo.uri)).await;
    let store = mongo.builder().standby_collection(STANDBY).over(&client).unwrap();
    let process = Process::over(store.clone()).await;
    process.sees("alpha", 429).await;
    process.pass().await;
    assert_eq!(mongo.status("alpha").await, "rate_limited");
    process.sees("beta", 401).await;
    process.pass().await;
    assert_eq!(mongo.document("beta").await.get_str("replacedBy").unwrap(), "spare");
    assert!(mongo.document("beta").await.get_f64("requestsCount").unwrap() > 2.0);

    process.pool.insert("gamma", "sk-gamma").await.unwrap();
    process.pool.reset("alpha").await.unwrap();
    assert_eq!(mongo.status("alpha").await, "healthy");
    process.pool.disable("alpha").await.unwrap();
    process.pool.remove("gamma").await.unwrap();
    // Only an acknowledged write tells these apart.
    mongo.insert("taken").await;
    let taken = process.pool.insert("taken", "sk-other").await;
    assert!(taken.as_ref().is_err_and(OperateError::is_taken), "{taken:?}");
    mongo.keys().delete_one(doc! { "_id": "alpha" }).await.unwrap();
    if process.status("alpha").is_some() {
        let gone = process.pool.reset("alpha").await;
        assert!(gone.as_ref().is_err_and(OperateError::is_unknown_key), "{gone:?}");
    }
    process.recovery.shutdown().await.unwrap();
    store.ensure_indexes().await.unwrap();

    let commands = commands.lock().unwrap();
    let named = |name: &'static str| commands.iter().filter(move |command| command.contains_key(name));
    for name in ["update", "findAndModify", "createIndexes"] {
        assert!(named(name).count() > 0, "{name}");
        for command in named(name) {
            let concern = command.get_document("writeConcern").unwrap_or_else(|_| panic!("{name}"));
            assert_eq!(concern.get_str("w").unwrap(), "majority", "{name}");
        }
    }
    for name in ["aggregate", "find"] {
        assert!(named(name).count() > 0, "{name}");
    }
    // A cursor's next part is asked of the server that has it, whatever else the driver says there.
    for command in commands.iter().filter(|command| !command.contains_key("getMore")) {
        let preference = command.get_document("$readPreference").and_then(|read| read.get_str("mode"));
        assert!(matches!(preference, Err(_) | Ok("primary")), "{:?} {preference:?}", command.keys().next());
    }
}

#[tokio::test]
async fn majority_write_concern_overrides_the_clients_w0() {
    assert_acknowledged_and_from_the_primary("w=0").await;
}

#[tokio::test]
async fn reads_go_to_the_primary_despite_secondary_preferred() {
    assert_acknowledged_and_from_the_primary("readPreference=secondaryPreferred&readConcernLevel=majority")
        .await;
}

async fn index_keys(collection: &mongodb::Collection<Document>) -> Vec<Document> {
    let mut indexes = collection.list_indexes().await.unwrap();
    let mut keys = Vec::new();
    while indexes.advance().await.unwrap() {
        keys.push(indexes.deserialize_current().unwrap().keys);
    }
    keys
}

#[tokio::test]
async fn only_ensure_indexes_creates_indexes() {
    let mongo = Mongo::standalone().await;
    mongo.insert_all(["alpha", "beta"]).await;
    mongo.standby().insert_one(standby("spare")).await.unwrap();
    let store = mongo.builder().standby_collection(STANDBY).connect(&mongo.uri).await.unwrap();
    let process = Process::over(store.clone()).await;
    process.sees("alpha", 429).await;
    process.sees("beta", 401).await;
    process.pass().await;
    process.pool.insert("gamma", "sk-gamma").await.unwrap();
    process.recovery.shutdown().await.unwrap();
    assert_eq!(index_keys(&mongo.keys()).await, [doc! { "_id": 1 }]);
    assert_eq!(index_keys(&mongo.standby()).await, [doc! { "_id": 1 }]);

    for _ in 0..2 {
        store.ensure_indexes().await.unwrap();
        let expected = [doc! { "status": 1, "cooldownUntil": 1 }, doc! { "limits.u": 1 }];
        assert_eq!(index_keys(&mongo.keys()).await[1..], expected);
        let expected = [doc! { "_id": 1 }, doc! { "isUsed": 1, "createdAt": 1 }];
        assert_eq!(index_keys(&mongo.standby()).await, expected);
    }
    mongo.standby().drop().await.unwrap();
    mongo.store().await.ensure_indexes().await.unwrap();
    assert_eq!(mongo.database.list_collection_names().await.unwrap(), ["keys"]);
}
