// Healthcheck: makes the replica set at the first time; fails until its one member takes writes.
const { MONGO_INITDB_ROOT_USERNAME: user, MONGO_INITDB_ROOT_PASSWORD: password } = process.env;
const admin = connect("mongodb://127.0.0.1:27017/admin?directConnection=true");
admin.auth(user, password);
try {
  rs.status();
} catch (error) {
  if (error.codeName !== "NotYetInitialized") throw error;
  rs.initiate({ _id: "rs0", members: [{ _id: 0, host: "mongo:27017" }] });
}
if (!admin.hello().isWritablePrimary) quit(1);
